"""A response is made: the model is asked, calls tools, is asked again, until it answers or a limit ends it."""
