"""What models know before and after: tasks, answers, scores."""
