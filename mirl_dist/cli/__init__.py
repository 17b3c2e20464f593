"""The commands of `mirl-dist`, one module each."""
