"""What was measured on the machine at hand, and decides there: which backend `auto` takes, and with which tiles."""
