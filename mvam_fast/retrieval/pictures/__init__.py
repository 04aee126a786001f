"""What views look at, what is retrieved, how much views differ."""
