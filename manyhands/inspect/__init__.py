"""What experts specialise in, measured beside what chance and a random router would show."""
