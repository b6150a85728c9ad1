"""What every part must do, as checks of any part of any table: `check` runs them, and so does a plugin of pytest.

A part of the model is checked in its place, as a small model that has it: every check of the model is a function of a
ModelConfig, and works for mixers, feed-forwards, norms, position schemes and whole families alike.
"""
