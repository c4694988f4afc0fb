"""h = act(gate) * up for every pair."""
