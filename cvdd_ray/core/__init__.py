"""Pure torch maths on plain arguments: no disk, no configuration object, no Ray."""
