"""Operations on finished tickets: open, verify, pack, export, compare, report."""
