"""x in the column order of each half of an act-ordered weight."""
