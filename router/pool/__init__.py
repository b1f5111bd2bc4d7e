"""The workers as a router knows them: who may enter, where a request goes, sessions, and the drivers that reach them."""
