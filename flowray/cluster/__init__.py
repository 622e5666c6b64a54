"""The Ray cluster: found or started, its nodes, what they hold and what they share."""
