"""The command `mirl-dist profile`: where the time of training steps goes."""
