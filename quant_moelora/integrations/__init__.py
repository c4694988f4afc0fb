"""transformers and PEFT: the only place that changes objects of other libraries."""
