"""Engines: one seam (`base.py`), a deterministic fake, transformers; nothing here knows HTTP."""
