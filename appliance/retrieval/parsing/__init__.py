"""Files become text: each format by a library of its own, in a child process that may be killed."""
