/* Growth against teardown (bits.cc get_or_install, group.cc put): two adders with a group reference
 * install the same unit and set their bits, a walker reads under its own reference, the group is removed.
 * Unit 0 = none; each adder brings its own (1, 2).
 * Mutants: STORE     install by a plain store: a unit is replaced and a bit lost
 *          EAGER     the tree is torn down by remove instead of by the last reference (weakness 1)
 */
byte unit; byte map[3]; bool unit_freed[3];
byte refs = 4;          /* table, adder, adder, walker */
bool gone; byte finished;

inline put() {
  bool last;
  atomic { refs--; last = (refs == 0) };
  if
  :: last -> atomic { assert(!gone); gone = true; unit_freed[unit] = true }
  :: else
  fi
}

proctype adder(byte me) {
  byte u;
  u = unit;
  if
  :: u == 0 ->
#ifdef STORE
     unit = me; u = me
#else
     atomic { if :: unit == 0 -> unit = me; u = me :: else -> u = unit; unit_freed[me] = true fi }
#endif
  :: else
  fi;
  atomic { assert(!unit_freed[u]); map[u] = map[u] | (1 << me) };
  assert(gone || (map[unit] & (1 << me)));
  finished++;
  put()
}

proctype walker() {
  byte u;
  u = unit;
  if
  :: u != 0 -> atomic { assert(!unit_freed[u]) }
  :: else
  fi;
  put()
}

proctype remover() {
#ifdef EAGER
  atomic { if :: unit != 0 -> unit_freed[unit] = true :: else fi }
#endif
  put()
}

init {
  atomic { run adder(1); run adder(2); run walker(); run remover() };
  finished == 2;
  assert(unit != 0 && (map[unit] == 6));
  refs == 0
}
