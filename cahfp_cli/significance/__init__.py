"""What each channel group is worth: gate statistics, criteria, and the scores file."""
