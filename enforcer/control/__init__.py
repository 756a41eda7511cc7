"""What the command line asks of a running agent: the socket, the answers, and the explanation of a verdict."""
