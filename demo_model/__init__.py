"""How the demo's model was made: its texts, its training, its quantisation, its perplexity. Not part of the package."""
