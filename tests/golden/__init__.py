"""Checkpoints as earlier versions wrote them. They are never written anew: what can't load them is a mistake."""
