"""One caller's side: what a request may ask, what the client gets, and the gRPC face."""
