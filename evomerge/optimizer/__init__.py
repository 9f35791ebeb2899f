"""The search without models: what is proposed, told, smoothed, stopped and chosen, and why."""
