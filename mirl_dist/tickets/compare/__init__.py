"""Tickets side by side: what there is to compare, statistics over seeds, tables, charts, one page."""
