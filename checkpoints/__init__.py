"""Other people's files: reading them safely, finding out what they are, matching them, and writing their formats."""
