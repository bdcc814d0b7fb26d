/* Bits of half-built, dying and reused ids (walk.cc step 4, weakness 6). Shrinker 1 has the id, is freed;
 * shrinker 2 takes the id, its owner adds an object before register. At rest its bit must be set.
 * Mutants: CLEAR_ANY     clear when no reference is to be had
 *          NO_LOOK       clear when the slot is empty, without the second look
 */
byte slot = 1;         /* which shrinker the id names, 0 = none */
byte refs[3];
byte objects[3];
bool sbit = 1;
byte finished;

proctype owner() {
  atomic { refs[1]-- };
  refs[1] == 0;        /* free: initial reference, then wait for the last put */
  slot = 0;
  slot = 2;            /* alloc: same id */
  objects[2] = 1;      /* add, 0 -> 1 */
  sbit = 1;
  refs[2] = 1;         /* register */
  finished++
}

proctype walker() {
  byte s, round = 0;
  bool got;
  do
  :: round < 2 ->
     if
     :: sbit ->
        s = slot;
        got = false;
        if
        :: s != 0 -> atomic { if :: refs[s] != 0 -> refs[s]++; got = true :: else fi }
        :: else
        fi;
        if
        :: got ->
           if
           :: objects[s] == 0 -> sbit = 0; if :: objects[s] != 0 -> sbit = 1 :: else fi
           :: else
           fi;
           atomic { refs[s]-- }
        :: else ->
#ifdef CLEAR_ANY
           sbit = 0
#else
           if
           :: s == 0 -> sbit = 0;
#ifndef NO_LOOK
              if :: slot != 0 -> sbit = 1 :: else fi
#endif
           :: else
           fi
#endif
        fi
     :: else
     fi;
     round++
  :: else -> break
  od;
  finished++
}

init {
  atomic { refs[1] = 1; run owner(); run walker(); run walker() };
  finished == 3;
  assert(objects[2] == 0 || sbit)
}
