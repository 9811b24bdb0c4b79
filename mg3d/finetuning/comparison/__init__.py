"""Many runs of many benchmarks, and the one table that compares weights with training from scratch."""
