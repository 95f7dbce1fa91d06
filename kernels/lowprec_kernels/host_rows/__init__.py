"""``gather_host_rows(ids, weight)``: rows of a table that stays in host memory, on the device of ``ids``; see the
reference."""
