/* Empty protocol at the lowest level: set_bit against clear_and_recheck (bits.cc A1..A3, W1..W3), with a
 * store buffer for each side, so that a missing full barrier shows.
 * Mutants: NO_ADD_FENCE, NO_CLEAR_FENCE, NO_RECHECK.
 */
byte objects_mem;  byte objects_buf; bool objects_pending;   /* adder's buffered store */
bool bit_mem = 1;  bool bit_pending;                         /* walker's buffered store of 0 */
bool added, walked;

proctype buffers() {
  do
  :: atomic { objects_pending -> objects_mem = objects_buf; objects_pending = 0 }
  :: atomic { bit_pending -> bit_mem = 0; bit_pending = 0 }
  :: atomic { added && walked && !objects_pending && !bit_pending -> break }
  od;
  assert(objects_mem == 0 || bit_mem)   /* an object is never without its bit at rest */
}

proctype adder() {
  bool seen;
  atomic { objects_buf = 1; objects_pending = 1 }     /* A1 */
#ifndef NO_ADD_FENCE
  (!objects_pending);                                 /* fence(seq_cst) */
#endif
  seen = bit_mem;                                     /* load */
  if
  :: !seen -> atomic { bit_mem = 1 }                  /* fetch_or */
  :: else
  fi;
  added = 1
}

proctype walker() {
  byte n;
  /* count said EMPTY before: */
  n = objects_mem;
  if
  :: n == 0 ->
     atomic { bit_pending = 1 }                       /* W1 clear */
#ifndef NO_CLEAR_FENCE
     (!bit_pending);                                  /* fence(seq_cst) */
#endif
#ifndef NO_RECHECK
     n = objects_mem;                                 /* W2 */
     if
     :: n != 0 -> (!bit_pending); atomic { bit_mem = 1 }  /* W3 */
     :: else
     fi
#endif
  :: else
  fi;
  walked = 1
}

init { atomic { run adder(); run walker(); run buffers() } }
