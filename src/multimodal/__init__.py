"""Pictures and sounds in the place of tokens: encoders, projectors, and the front end that a model gets of them."""
