"""The command line of esm-stream: parses, calls the library, shows; decides nothing."""
