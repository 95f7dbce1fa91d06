"""``norm_(x, norm, found_inf)``: the norm of a gradient and the flag of one that is not finite; see the reference."""
