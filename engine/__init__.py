"""What a reader of the paper may skip: errors, files, downloads, runs, speed, several processes."""
