"""Compares tickets in numbers: statistics over seeds, judgements, overlap of masks, the paper's figures."""
