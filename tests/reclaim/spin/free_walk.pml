/* Free against walk: src/reclaim/shrinker.cc steps 3..9, walk.cc steps 3..7, where the block goes back to the
 * allocator (recycle.pml: where it serves the next one). Two shards, two walkers.
 * Mutants: NO_REF    the walker calls back without a reference
 *          NO_WAIT   free does not wait for the completion
 *          NO_GRACE  memory is freed without a grace period
 *          NO_RCU    the last put signals outside of RCU
 *          HALF      register publishes the count before the fields (weakness 8)
 */
#define W 2
byte refs[2];              /* one count per shard */
byte live_shards;
bool ready, completed, slot, freed, free_returned;
bool reader[3];            /* RCU read sections: walkers 0, 1 and the owner 2 */

inline touch() { assert(!freed) }

inline put(rd, sh) {
  byte last;
  atomic { touch(); refs[sh]--; last = (refs[sh] == 0) }
  if
  :: last ->
#ifndef NO_RCU
     reader[rd] = true;
#endif
     atomic { touch(); live_shards--; last = (live_shards == 0) }
     if
     :: last -> completed = true; /* free may go on here ... */
        touch()              /* ... and the wake still touches it */
     :: else
     fi;
     reader[rd] = false
  :: else
  fi
}

proctype walker(byte me) {
  bool got, found;
  byte round = 0;
  do
  :: round < 2 ->
     reader[me] = true;
     found = slot;
     got = false;
     if
     :: found ->
        atomic { touch(); if :: refs[me] > 0 -> refs[me]++; got = true :: else fi }
     :: else
     fi;
     reader[me] = false;
#ifdef NO_REF
     if :: found && ready -> assert(!free_returned) :: else fi;
#endif
     if
     :: got -> assert(ready); assert(!free_returned); touch(); assert(!free_returned); put(me, me)
     :: else
     fi;
     round++
  :: else -> break
  od
}

proctype owner() {
  slot = true;                       /* alloc: found, count 0 */
#ifdef HALF
  refs[0] = 1; refs[1] = 1; live_shards = 2; ready = true;
#else
  ready = true; live_shards = 2;
  refs[0] = 1; refs[1] = 1;          /* register */
#endif
  put(2, 0);
  put(2, 1);
#ifndef NO_WAIT
  completed;
#endif
  slot = false;
  free_returned = true;
#ifndef NO_GRACE
  /* each read section that had begun before has ended */
  byte i = 0;
  do
  :: i < 3 -> (!reader[i]); i++
  :: else -> break
  od;
#endif
  freed = true
}

init { atomic { run walker(0); run walker(1); run owner() } }
