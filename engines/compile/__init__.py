"""The engine builder: turns a checkpoint into a bundle, one module per stage. `build` runs them all."""
