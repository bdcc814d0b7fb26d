/* Type-stable blocks: src/reclaim/shrinker.cc L1..L4 against alloc, register and free. One block serves three
 * shrinkers one after the other, with ids 0, 1 and 0 again, without a grace period between them. Two walkers
 * look for id 0, each on its own shard. A callback must be one of a living shrinker that has id 0.
 * Mutants: NO_LOOK   the walker does not look at the id again after its try_get (L3)
 *          NO_WAIT   free does not wait for the completion: the block changes hands under a callback
 *          HALF      register publishes the counts before the fields and the completion
 *          STALE     register forgets to reset the completion: the second free does not wait
 */
byte refs[2], live_shards, life, id;   /* the block; life: whose callbacks it holds */
bool completed;
bool slot[2];
bool alive[4];
byte id_of[4];

inline put(sh) {
  byte last;
  atomic { assert(refs[sh] > 0); refs[sh]--; last = (refs[sh] == 0) }
  if
  :: last ->
     atomic { assert(live_shards > 0); live_shards--; last = (live_shards == 0) }
     if
     :: last -> completed = true
     :: else
     fi
  :: else
  fi
}

proctype walker(byte me) {
  bool got;
  byte round = 0;
  do
  :: round < 2 ->
     got = false;
     if
     :: slot[0] ->                                                     /* L1 */
        atomic { if :: refs[me] > 0 -> refs[me]++; got = true :: else fi }   /* L2 */
     :: else
     fi;
#ifndef NO_LOOK
     if
     :: got && id != 0 -> put(me); got = false                         /* L3 */
     :: else
     fi;
#endif
     if
     :: got -> assert(alive[life]); assert(id_of[life] == 0); assert(alive[life]); put(me)
     :: else
     fi;
     round++
  :: else -> break
  od
}

inline serve(k, new_id) {
  alive[k] = true; id_of[k] = new_id;
#ifdef HALF
  slot[new_id] = true; refs[0] = 1; refs[1] = 1;
  id = new_id; life = k; completed = false; live_shards = 2;
#else
  id = new_id; slot[new_id] = true; life = k;
#ifndef STALE
  completed = false;
#endif
  live_shards = 2; refs[0] = 1; refs[1] = 1;
#endif
  put(0);
  put(1);
#ifndef NO_WAIT
  completed;
#endif
  slot[new_id] = false;
  alive[k] = false
}

proctype owner() {
  serve(1, 0);
  serve(2, 1);
  serve(3, 0)
}

init { atomic { run walker(0); run walker(1); run owner() } }
