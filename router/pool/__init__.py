"""The workers as a router knows them: who may enter, where a request goes, sessions, and what reaches them."""
