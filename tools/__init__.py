"""What makes the models that flowray ships, and what `make setup` runs."""
