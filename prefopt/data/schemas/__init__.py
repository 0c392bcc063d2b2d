"""The shapes that rows of preference data come in; `base` says what a shape is."""
