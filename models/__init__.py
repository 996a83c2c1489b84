"""Networks and mathematics in pure torch: no I/O, no ray."""
