"""What `make bench-jobs` is made of."""
