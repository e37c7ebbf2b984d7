"""The processes behind guests, as a monitor handles them: started, heard, sampled, reaped."""
