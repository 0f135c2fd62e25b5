"""What each part of the method contributes: arms trained on the embedded corpus, and compared."""
