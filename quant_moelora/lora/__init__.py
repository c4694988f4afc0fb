"""Adapters: files, bank and the injection that carries them into a layer."""
