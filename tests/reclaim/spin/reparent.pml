/* Deferred work when a group goes (bits.cc add_deferred, claim_deferred, move_deferred_cell): two adders of
 * one each, a claimer, the remover. At rest nothing is left in the child and nothing is lost or doubled.
 * Mutants: COPY        the remover reads and marks in two steps (the kernel's, weakness 7)
 *          CLAIM_DEAD  a claim takes the dead marker for work
 *          NO_SETTLE   an adder does not look at `dead` after its add (the unit came after the remover)
 */
#define DEAD 99
byte child, parent, claimed, finished;
bool dead, installed;            /* installed: the child's unit exists */

inline move() {
  byte v;
#ifdef COPY
  v = child; child = DEAD;
#else
  atomic { v = child; child = DEAD };
#endif
  if :: v != DEAD && v != 0 -> atomic { parent = parent + v } :: else fi
}

proctype adder() {
  bool up;
  installed = true;                  /* make_unit */
  atomic {
    if :: child == DEAD -> up = true :: else -> child = child + 1; up = false fi
  };
  if
  :: up -> atomic { parent = parent + 1 }
  :: else ->
#ifndef NO_SETTLE
     if :: dead -> move() :: else fi
#else
     skip
#endif
  fi;
  finished++
}

proctype claimer() {
  atomic {
#ifdef CLAIM_DEAD
    claimed = claimed + child; child = 0
#else
    if :: child != DEAD -> claimed = claimed + child; child = 0 :: else fi
#endif
  };
  finished++
}

proctype remover() {
  dead = true;
  if :: installed -> move() :: else fi;   /* move_up walks the units there are */
  finished++
}

init {
  atomic { run adder(); run adder(); run claimer(); run remover() };
  finished == 4;
  assert(parent + claimed == 2 && (child == DEAD || child == 0))
}
