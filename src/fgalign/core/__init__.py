"""What every stage shares: records and their files, tokens, models, tensor operations, rollouts."""
