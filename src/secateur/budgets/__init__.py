"""What a pruned model may cost: parameters, multiply-adds, bytes or measured milliseconds, and how it is kept to that."""
