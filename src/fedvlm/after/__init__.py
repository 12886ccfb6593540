"""The steps after training: export, answers, scores on new data, and new sites."""
