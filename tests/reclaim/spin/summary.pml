/* Two levels of bits (bits.cc propagate, walk.cc settle_up), two adders, two walkers. Each adder has its
 * own bit in the map. At rest a bit in the map has its summary bit.
 * Mutants: NO_LOOK    settle_up clears the summary without a second look
 *          TRUST_MAP  an adder whose word was not zero does not look at the summary at all
 */
byte map; bool summary;
byte obj[2]; byte finished;

inline set_bit(k) {
  byte before;
  atomic { before = map; map = map | (1 << k) }
#ifdef TRUST_MAP
  if :: before == 0 -> summary = 1 :: else fi;
  assert(summary || true)
#else
  if :: !summary -> summary = 1 :: else fi
#endif
}

proctype adder(byte k) {
  obj[k] = 1;
  set_bit(k);
#ifdef TRUST_MAP
  assert(summary || obj[k] == 0 || !(map & (1 << k)))   /* what set_bit promises when it returns */
#endif
  finished++
}

proctype walker() {
  byte k = 0;
  if
  :: summary ->
     do
     :: k < 2 ->
        if
        :: (map & (1 << k)) && obj[k] == 0 ->
           atomic { map = map & (3 - (1 << k)) };
           if :: obj[k] != 0 -> set_bit(k) :: else fi
        :: (map & (1 << k)) && obj[k] != 0 -> obj[k] = 0
        :: else
        fi;
        k++
     :: else -> break
     od;
     if
     :: map == 0 ->
        summary = 0;
#ifndef NO_LOOK
        if :: map != 0 -> summary = 1 :: else fi
#endif
     :: else
     fi
  :: else
  fi;
  finished++
}

init {
  map = 1; summary = 1;               /* a stale bit is there at the start */
  atomic { run adder(0); run adder(1); run walker(); run walker() };
  finished == 4;
  assert(map == 0 || summary);
  assert(obj[0] == 0 || (map & 1));
  assert(obj[1] == 0 || (map & 2))
}
