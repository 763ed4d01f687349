"""The tests. One file per room of the packages; `integration/` runs the whole road."""
