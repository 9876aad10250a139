"""Several engines behind one server, as replicas of a Ray Serve deployment; needs the extra `ray`."""
