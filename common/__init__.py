"""What producer and worker share: wire types, key names, errors, settings, serializer, log."""
