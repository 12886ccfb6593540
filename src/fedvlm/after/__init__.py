"""What comes after training: exported adapters, answers, scores on new data, and new sites."""
